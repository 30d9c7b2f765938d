"""One runtime for processes on this machine or a Ray cluster: launch, talk, watch, replace, sync weights."""
