"""Paper that knows no coder: tables and pages, strips of pictures, plots."""
