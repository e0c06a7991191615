"""The function host: an unmodified function_app.py, served on 127.0.0.1 as Azure serves it."""
