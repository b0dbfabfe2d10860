"""Which settings of a plug-in have a docstring."""

import ast
import inspect
import textwrap


def explained(kind: type) -> set[str]:
    """Names of the fields that a docstring follows, in the class or one that it stands on."""
    found = set()
    for parent in kind.__mro__[:-1]:
        if parent.__module__ == "typing":
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found.add(statement.target.id)
    return found
