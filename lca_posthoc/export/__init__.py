"""Export findings for other programs: NetCDF, CSV and Parquet files, TensorBoard events."""

from .netcdf import read_netcdf
from .write import FORMATS, export, export_comparison

__all__ = ["FORMATS", "export", "export_comparison", "read_netcdf"]
