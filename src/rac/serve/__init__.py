"""The page of `rac serve`: checks of what visitors send (`guard`), and the layout (`page`).

Only `page` knows gradio, and imports it when a page is made.
"""
