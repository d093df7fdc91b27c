"""The house: no circle of imports, none of a room above or of the bench, and no room that outgrows the others."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ddfast"

# Every room and those that it stands on: it may import these, whatever they stand on, and the ground, bottom up.
ROOMS = {
    "ops": (),
    "data": ("ops",),
    "output": ("data",),
    "masked_forward": ("ops",),
    "attribution": ("masked_forward",),
    "captum": ("attribution",),
    "gradients": ("ops",),
    "information": ("ops",),
    "models": ("ops",),
    "condensation": ("methods",),
    "training": ("output", "models"),
    "methods": ("training", "attribution", "gradients", "information"),
    "pipeline": ("methods",),
    "report": ("pipeline", "captum"),
}
# Files that every room may import, and that import no room.
GROUND = (
    *(
        "arguments",
        "crowding",
        "fetching",
        "errors",
        "files",
        "history",
        "isolation",
        "philox",
        "progress",
        "random_states",
        "ranks",
    ),
    *("seeding", "settings", "state", "unchanged", "version", "wording"),
)
# They may import everything, and no room imports them.
DOORS = ("__init__", "__main__", "cli", "commands", "comparison", "demo", "distillation")


def modules():
    """Every module of the package: dotted name -> path."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path, known):
    """Names of the modules that a file imports, inside of functions too, but for a type checker's eyes alone."""
    tree = ast.parse(path.read_text("utf-8"))
    unseen = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to its folder"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def graph():
    known = modules()
    return {name: sorted(set(imports(path, known)) - {name}) for name, path in known.items()}


def room_of(module):
    return module.split(".")[1] if "." in module else "__init__"


def below(room):
    """The rooms that a room may import."""
    found = set()
    for inner in ROOMS[room]:
        found |= {inner} | below(inner)
    return found


def circle(edges):
    """One circle of imports as the names along it; None where there is none."""
    done, way = set(), []

    def follow(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in edges:
            return None
        way.append(name)
        found = next(filter(None, map(follow, edges[name])), None)
        way.pop()
        done.add(name)
        return found

    return next(filter(None, map(follow, edges)), None)


def test_every_file_stands_in_a_room():
    assert {room_of(name) for name in modules()} == {*ROOMS, *GROUND, *DOORS}


def test_no_modules_import_each_other_in_a_circle():
    assert circle({"a": ["b", "d"], "b": ["c"], "c": ["a"], "d": []}) == ["a", "b", "c", "a"]
    assert circle(graph()) is None


def test_no_import_points_up():
    wrong = []
    for name, imported in graph().items():
        room = room_of(name)
        if room in DOORS:
            continue
        allowed = {room, *GROUND, "kernels"} | (below(room) if room in ROOMS else set())
        own = [module for module in imported if module.split(".")[0] == "ddfast"]
        wrong += [f"{name} imports {module}" for module in own if room_of(module) not in allowed]
    assert wrong == []


def test_nothing_that_is_installed_imports_the_bench_or_the_tests():
    kernels = PACKAGE.parent / "kernels"
    paths = [*modules().values(), *kernels.glob("*.py")]
    assert len(paths) > len(modules())
    assert not [
        path for path in paths for module in imports(path, ()) if module.split(".")[0] in ("bench", "tests")
    ]


def test_no_room_holds_more_than_a_fifth_of_the_lines():
    lines = Counter()
    for name, path in modules().items():
        lines[room_of(name)] += path.read_text("utf-8").count("\n")
    room, most = lines.most_common(1)[0]
    assert most <= sum(lines.values()) / 5, f"{room} holds {most} of {sum(lines.values())} lines"


def test_nothing_seeds_all_gpus():
    """`torch.manual_seed` does, and takes its caller's seed from a GPU that is not used yet."""
    for name, path in modules().items():
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8")))
                 if isinstance(node, ast.Call)]  # fmt: skip
        assert not {"torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"} & set(
            calls
        ), name
