"""Large question-answer scenes, composed from labelled tiles: `lrs-edge scenes`.

    library.py    which tiles there are, and what each shows
    rules.py      what may be background, and what must not be asked beside what
    plan.py       where each tile lies in one scene: numbers, no pixels
    tiles.py      pixels of tiles
    background.py the texture under the places
    render.py     any window of a planned scene, at any size
    wording.py    templates, and the grammar of names
    questions.py  questions, answers and evidence boxes, from a plan
    geotiff.py    a scene as GeoTIFF or COG
    write.py      a set: images, JSONL, and the record of how they were made

Needs numpy, Pillow and rasterio; knows nothing of models and never imports torch.
"""
