"""A self-contained HTML page about one compression."""

from tensornet_hf.report.facts import ModelFacts
from tensornet_hf.report.page import Page, versions, write_report
from tensornet_hf.report.spectra import BondSpectrum, bond_spectra

__all__ = ["BondSpectrum", "ModelFacts", "Page", "bond_spectra", "versions", "write_report"]
