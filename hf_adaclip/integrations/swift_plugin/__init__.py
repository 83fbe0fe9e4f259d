"""A folder with one file: ms-swift puts the folder of `--external_plugins` first on `sys.path`, so nothing else may be importable there."""
