"""From text to a pattern: names of the registry with their numbers, joined by | and &, as in "row|neighborhood(7)"."""

import ast
import difflib

from igpt_fast.errors import InputError
from igpt_fast.patterns.predicates import PATTERNS, Pattern

MOST = 1000  # characters: a text may come with a stranger's weights
_EXAMPLE = "write names joined by | and &, such as row|neighborhood(7)"


def parse(text: str) -> Pattern:
    """The pattern that `text` names. Raises InputError that shows what is wrong and the nearest valid form."""
    if len(text) > MOST:
        raise InputError(f"pattern {text[:40]!r}… has {len(text):,} characters; use at most {MOST:,}")
    try:
        return _pattern(ast.parse(text.strip(), mode="eval").body, text)
    except InputError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of too many brackets, the last two
        raise InputError(f"pattern {text!r} cannot be read; {_EXAMPLE}") from None


def _pattern(node: ast.AST, text: str) -> Pattern:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _pattern(left, text) | _pattern(right, text)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _pattern(left, text) & _pattern(right, text)
        case ast.Name(id=name):
            return _named(name, text)()
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            options = {k.arg: _number(k.value, text) for k in keywords if k.arg}
            if len(options) == len(keywords):
                return _named(name, text)(*(_number(a, text) for a in args), **options)
    raise InputError(f"pattern {text!r}: {ast.unparse(node)!r} is not a pattern; {_EXAMPLE}")


def _named(name: str, text: str):
    if name in PATTERNS:
        return PATTERNS[name]
    near = difflib.get_close_matches(name, PATTERNS, 1)
    nearest = f"; did you mean {text.replace(name, near[0])!r}?" if near else "."
    raise InputError(f"no pattern named {name!r}{nearest} There are {', '.join(PATTERNS)}")


def _number(node: ast.AST, text: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, text)
    raise InputError(f"pattern {text!r}: {ast.unparse(node)} is not a whole number")
