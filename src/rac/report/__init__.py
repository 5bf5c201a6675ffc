"""Reports, independent of coders: tables and pages, strips of pictures, plots."""
