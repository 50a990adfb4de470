"""Optimizers: SAM, LookSAM, LookLayerSAM around any base; Lamb, Lars; one table of names."""
