"""Failed assertions in the shared checks show their values, as those in tests do."""

import pytest

pytest.register_assert_rewrite("tests.models.checks")
