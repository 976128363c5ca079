"""Findings for other programs: NetCDF, CSV and Parquet files, TensorBoard events."""

from .netcdf import read_netcdf
from .write import FORMATS, export

__all__ = ["FORMATS", "export", "read_netcdf"]
