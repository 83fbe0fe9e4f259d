"""Prints the path for ms-swift: `--external_plugins "$(python -m hf_adaclip.integrations.swift_plugin)" --callbacks adaclip`."""

from pathlib import Path

print(Path(__file__).with_name("adaclip_swift.py"))
