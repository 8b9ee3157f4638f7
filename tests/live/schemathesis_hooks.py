"""For schemathesis: requests that are as odd as before, but do not have the encoder look for minutes."""

import schemathesis

MOST = {"patches": 16, "windows": 1}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict) -> None:
    options = case.body.get("options") if isinstance(case.body, dict) else None
    if case.path.endswith("/semantic-map") and isinstance(options, dict):
        options.setdefault("patches", MOST["patches"])
        for name, most in MOST.items():
            value = options.get(name)
            if isinstance(value, (int, float)) and most < value <= 256:
                options[name] = most
