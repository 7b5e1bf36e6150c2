"""The settings of COBRA's forms, and what the studies on validation change in them; "lr" is a multiple of the best rate there.

What the forms differ in is spelled out, so that their rows keep their meaning when the package's defaults change.
"""

PAPER = {
    "gate": "concrete",
    "prior_scale": "literal",
    "prior_level": "group",
    "fusion": "product",
    "gamma": 5.0,
    "beta": 0.01,
    "open_probability": 0.5,
    "init": "uniform",
    "gate_lr_scale": 1.0,
    "lora_B_lr_scale": 1.0,
    "r_max_multiple": 2,
    "cut": 1.0,
}
# rows of lora_A along the calibration's gradient are as long as uniform ones here, and a third of that in COBRA's form: inputs
# vary about three times as much along them (`bench.accuracy.starts`)
LONG_COBRA = {
    **PAPER,
    "prior_scale": "log",
    "gamma": 1.0,
    "open_probability": 0.9,
    "init": "gradient",
    "minimum": 1,
    "cut": 0.4,
}
# ranks from a wide search without gates or calibration: what the singular directions alone decide
SINGULAR = {"gate": "open", "init": "uniform", "basis": "singular", "r_max_multiple": 8, "cut": 0.4, "scores": False}
JOINT = {**LONG_COBRA, "basis": "singular"}  # gates, and a cut that ranks what they leave of every direction
LONG_ROWS, SHORT_ROWS, FITTED = 3.0, 1 / 3, "fitted"  # the last to every row's own inputs
LEVEL_ROWS = 0.1  # along them the loss is as steep in lora_B as along uniform rows (`bench.accuracy.starts`)
COBRA = {**LONG_COBRA, "row_scale": SHORT_ROWS}
UNSAID = {"basis": "gates", "init_scale": 1.0}  # what COBRA's forms have where they do not say it
FORMS = ("cobra", "cobra+quick", "cobra+long", "cobra+long+quick", "cobra+singular")
SETTINGS = {
    "paper": PAPER,
    "singular": SINGULAR,
    "cobra": COBRA,
    "cobra+quick": COBRA,
    "cobra+long": LONG_COBRA,
    "cobra+long+quick": LONG_COBRA,
    "cobra+singular": JOINT,
}
# fields of a recipe that belong to the method
MEASURED = {"cobra+quick": {"calibration_examples": 16}, "cobra+long+quick": {"calibration_examples": 16}}
TIGHT = 2 / 9  # the parameters of rank 1 on the layers below, over those of rank 1 on all linear layers of MiniLM
# at an average rank below 1 LoRA has to choose layers: its usual choice, at rank 1
FEW_LAYERS = {
    "lora": {"layers": "query,value"},
    "cobra+long": {**LONG_COBRA, "minimum": 0, "r_max_multiple": 18},
    "cobra+singular": {**JOINT, "minimum": 0, "r_max_multiple": 18},
    "random": {"r_max_multiple": 18},
    "singular": {**SINGULAR, "r_max_multiple": 18},
}
REGRESSION_PARTS = (
    {},
    {"init": "uniform"},
    {"gate": "open"},
    {"gate": "open", "r_max_multiple": 1},
    {"gate": "open", "r_max_multiple": 1, "init": "uniform"},
    {"gamma": 0.0},
    {"cut": 0.1},
    {"basis": "singular"},
    {"basis": "singular", "gate": "open"},
    {"fusion": "sum"},
    {"fusion": "contribution"},
    {"fusion": "gradient"},
    {"init": "uniform", "row_scale": LONG_ROWS},
    {"row_scale": SHORT_ROWS},
    {"gate": "open", "r_max_multiple": 1, "init": "uniform", "row_scale": LONG_ROWS},
    {"open_probability": 0.5},
)
DEFAULT_PARTS = (
    {},
    {"gate": "open"},
    {"gate": "open", "r_max_multiple": 1},
    {"gamma": 0.0},
    {"cut": 0.1},
    {"row_scale": FITTED},
    {"row_scale": FITTED, "lr": 2.0},
    {"row_scale": LEVEL_ROWS},
    {"row_scale": LEVEL_ROWS, "lr": 2.0},
    {"init": "uniform", "row_scale": 1.0, "lr": 2.0},
    {"gate": "open", "r_max_multiple": 1, "lr": 2.0},
)
SINGULAR_PARTS = (
    {},
    {"init": "gradient", "scores": True},
    {"init": "gradient", "scores": True, "r_max_multiple": 2},
    {"init": "gradient", "scores": True, "r_max_multiple": 2, "lr": 2.0},
    {"r_max_multiple": 4},
    {"r_max_multiple": 2, "lr": 2.0},
    {"cut": 0.1},
    {"cut": 0.7},
)
SHORT_PARTS = (
    {},
    {"lr": 0.5},
    {"init": "uniform"},
    {"gate": "open"},
    {"gate": "open", "init": "uniform"},
    {"gate": "open", "r_max_multiple": 1, "init": "uniform"},
    {"lr": 0.5, "init": "uniform"},
    {"lr": 0.5, "gate": "open", "r_max_multiple": 1, "init": "uniform"},
    {"basis": "singular"},
    {"basis": "singular", "lr": 0.5},
    {"lr": 0.5, "init": "uniform", "row_scale": LONG_ROWS},
    {"lr": 0.5, "row_scale": SHORT_ROWS},
)
TIGHT_PARTS = (
    {},
    {"init": "uniform"},
    {"gate": "open"},
    {"gate": "open", "init": "uniform"},
    {"gate": "open", "init": "uniform", "r_max_multiple": 4.5},
    {"gate": "open", "init": "uniform", "cut": 0.1},
    {"lr": 2.0},
    {"basis": "singular", "lr": 2.0},
)
PUBLISHED_PARTS = (
    {},
    {"gamma": 0.0},
    {"gamma": 50.0},
    {"beta": 0.0},
    {"beta": 1.0},
    {"fusion": "sum"},
    {"fusion": "contribution"},
    {"fusion": "gradient"},
    {"open_probability": 0.9},
    {"prior_scale": "log", "gamma": 1.0},
    {"init": "gradient"},
    {"minimum": 1},
    {"cut": 0.4},
)
FACTORS = (
    {},
    {"gate": "open", "r_max_multiple": 1},
    {"init": "uniform"},
    {"minimum": 1},
    {"fusion": "gradient"},
    {"fusion": "contribution"},
    {"prior_level": "group"},
    {"gate_lr_scale": 30.0},
    {"prior_level": "group", "minimum": 1},
    {"prior_level": "group", "minimum": 1, "init": "uniform"},
    {"gate": "concrete"},
    {"cut": 0.1},
)
FACTOR_REFERENCE = {
    **PAPER,
    "gate": "mean",
    "prior_scale": "log",
    "prior_level": "rank",
    "gamma": 1.0,
    "open_probability": 0.95,
    "init": "gradient",
    "cut": 0.4,
}
LORA_PARTS = ({}, {"scaling": 1.0, "lr": 2.0}, {"scaling": 4.0, "lr": 0.5})
# the wide sweep, of settings and of what a calibration measures
WIDE_PARTS = (
    {},
    {"gate": "straight_through"},
    {"gate": "mean"},
    {"open_probability": 0.5},
    {"prior_scale": "literal", "gamma": 5.0},
    {"prior_scale": "standardized"},
    {"prior_level": "rank"},
    {"granularity": "block"},
    {"estimator": "conductance"},
    {"estimator": "direct"},
    {"path_points": 2},
    {"calibration_examples": 16},
    {"beta": 0.0},
    {"beta": 1.0},
    {"kl": "concrete"},
    {"gate_lr_scale": 30.0},
    {"lora_B_lr_scale": 4.0, "lr": 0.5},
    {"r_max_multiple": 4},
    {"cut": 0.7},
    {"minimum": 0},
    {"scaling": 1.0, "lr": 2.0},
    {"scaling": 4.0, "lr": 0.5},
    {"gate": "hard_concrete"},
    {"drawn": "example"},
    {"gate": "open", "rounds": 8},
    {"fold": "mean"},
    {"open_probability": 0.5, "scaling": 4.0},  # the scale of open gates, as the mean gate halves it
    {"objective": "count"},
)
# what a study is relative to, by the name of the form
REFERENCES = {
    "cobra": (COBRA,),
    "cobra+long": (LONG_COBRA, FEW_LAYERS["cobra+long"]),
    "published": (PAPER,),
    "singular": (SINGULAR,),
}
