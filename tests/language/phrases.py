"""Phrases and names that this project has abandoned, and what to write instead.

A phrase is a regular expression (case is ignored) for comments, docstrings, messages and documentation. A name is one
that a function, class, argument, attribute or variable must not have in the given folders.
"""

PHRASES = {
    r"\b(go|goes|going|gone|went) on\b(?! the)": "continue, resume",
    r"\bbroken off\b|\bbreaks? off\b": "interrupted",
    r"\bwhere it (was|stood|stopped)\b": "resumes",
    r"\b(what|such as|which) cannot be\b([.,:;]|$)": "invalid",
    r"\bceremony\b": "say what would block",
    r"\bother ones\b": "a different subset",
    r"^all of it\b": "name it: the complete configuration",
    r"\baloud\b": "logged, reported",
    r"\btake back what\b": "load the state",
    r"\bleaves? open\b|\bleft open\b": "unset options",
    r"\bcomes? to (the same|nothing|this|that)\b|\bwhat .{3,40} comes? to\b": "equals, is, amounts to",
    r"\bcomes? to an end\b": "ends",
    r"\bbeside\b": "next to, in addition to, alongside",
    r"\blet alone\b|\bfor good\b|\bof (its|their) own accord\b": "leave it out",
    r"\basked to leave\b|\band leaves?\b(?! (it|them|its|the|a|no|their|one|room))": "asked to stop, stops",
    r"\bwhoever\b|\bwhosoever\b": "name who",
    r"\bforeign (files?|folders?)\b": "files of other programs",
    r"\bits? is (said|told)\b": "it is reported",
    r"\bin hand\b|\bat rest\b": "name the state",
    r"\bas it were\b|\bso to speak\b": "leave it out",
    r"\bnone of (its|their) business\b": "leave it out",
}

NAMES = {
    "": {
        "Masters",
        "Need",
        "MapNorm",
        "Portion",
        "Recycler",
        "STATED",
        "Standing",
        "StillRead",
        "_shadow",
        "accuse",
        "follow",
        "guilty",
        "leave_seconds",
        "mend",
        "near_gpu",
        "optimizer_form",
        "picks",
        "share",
        "stall_timeout",
        "story",
        "watched",
        "weigh",
    },
    "fat/kernels": {"upper", "known", "by_x", "plain"},
    "fat/blocks.py": {"plain"},
    "launch/machine": {"limits"},
    "pipeline/plan.py": {"window"},
    "pipeline/storage": {"expect", "reached"},
}
