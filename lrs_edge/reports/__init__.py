"""Reports: an answer as a picture, as a page, and as layers of a map.

Read `save.py` first: which forms there are, and what is refused before a question is asked.
`views.py` reads the little of the image that a report shows, `picture.py` draws a PNG, `page.py`
writes one HTML file (with `page.css` and `page.js`), `geopackage.py` a GeoPackage. GeoJSON is that
of `answer/report.py`.
"""
