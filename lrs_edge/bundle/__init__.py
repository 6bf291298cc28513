"""The model bundle on disk: manifest, verification, embeddings. Nothing here runs a model."""
