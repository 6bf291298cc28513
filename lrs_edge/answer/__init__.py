"""Answers: text, places, timings; their evidence, their forms (JSON, GeoJSON, text), traces."""
