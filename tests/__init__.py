from pkgutil import iter_modules

import pytest

# What shared modules assert is told with its values too, as what test files assert is.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))
