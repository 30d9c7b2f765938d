"""What a run writes down and shows: `metrics` (files), `console` (live lines, final table), `html` (the page)."""
