"""The page of `rac serve`: what visitors may send (`guard`, `numbers`), answers (`generate`, `html`), layout (`page`).

Only `page` knows gradio, and imports it when a page is made.
"""
