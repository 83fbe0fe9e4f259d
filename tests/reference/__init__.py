"""Slow, obvious implementations in float64, written from the papers and the method's description, importing nothing from hf_adaclip."""
