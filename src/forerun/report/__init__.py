"""What people see of a run: console lines, tables, offline pages, plots."""
