"""Bundles kept in the user's folder of models, and how they get there.

`folder.py` first: where the folder is, what is in it, how a bundle takes its place. `members.py`
says which names and sizes of files are taken from elsewhere, `archive.py` packs a bundle into one
file and unpacks it, `download.py` fetches over HTTP, `pull.py` puts these together. All of it is
data from a stranger: a bundle is written under a temporary name, and gets its own when every hash
of its manifest holds.
"""
