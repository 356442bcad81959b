"""Where samples come from: files of conversations, WebDataset shards, Parquet tables, folders of images.

``opening.py`` chooses the reader of a path, ``source.py`` says what all readers have in common. Every reader gives
random access and holds nothing in memory that grows with the number of samples, but for small folders and JSON arrays:
``index.py`` keeps where each sample lies in a file beside the data.
"""
