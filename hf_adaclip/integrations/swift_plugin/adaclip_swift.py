"""The file that ms-swift imports: it makes `--callbacks adaclip` known."""

from hf_adaclip.integrations.swift import register

register()
