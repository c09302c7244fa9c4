# The compiled extension; csrc/bindings.cpp is its table.
from typing import Any

def __getattr__(name: str) -> Any: ...
