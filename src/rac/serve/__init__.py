"""The page of `rac serve`: what it lets in (`guard`) and how it looks (`page`).

Only `page` knows gradio, and imports it when a page is made.
"""
