"""Charts as HTML and SVG: text stays text of the page, so that it is readable at any width."""
