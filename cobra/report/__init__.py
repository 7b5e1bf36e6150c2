"""A run on one page. Its figures need matplotlib; everything is imported when it is used."""
