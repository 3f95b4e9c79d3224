"""A domain: where its prompts come from, how they are split, its tools and its reward. No torch."""

from posttrain.domains.config import DataConfig, DomainSpec, SourceConfig, ToolConfig
from posttrain.domains.duplicates import near_duplicates
from posttrain.domains.fingerprint import fingerprint
from posttrain.domains.mixing import check_parts
from posttrain.domains.objects import import_object
from posttrain.domains.overlap import Overlap, near_tests, overlaps
from posttrain.domains.rows import (
    Row,
    is_heldout,
    refuse_names_of_tool_arguments,
    row_of,
    split,
)
from posttrain.domains.sides import ROWS_TO_CHECK, Need, load_sides, rows_to_check
from posttrain.domains.sources import load_rows, stream_rows
from posttrain.domains.tools import Toolbox

__all__ = [
    "ROWS_TO_CHECK",
    "DataConfig",
    "DomainSpec",
    "Need",
    "Overlap",
    "Row",
    "SourceConfig",
    "ToolConfig",
    "Toolbox",
    "check_parts",
    "fingerprint",
    "import_object",
    "is_heldout",
    "load_rows",
    "load_sides",
    "near_duplicates",
    "near_tests",
    "overlaps",
    "refuse_names_of_tool_arguments",
    "row_of",
    "rows_to_check",
    "split",
    "stream_rows",
]
