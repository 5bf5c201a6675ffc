"""Judging coders: metrics of images, cost of networks, pictures and reports."""
