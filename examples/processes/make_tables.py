"""Three synthetic tables about partly the same customers: a bank that knows who defaulted, a grocer, a telco."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

folder = Path(sys.argv[1])
rng = np.random.default_rng(5)
customers = 1500
email = np.array([f"customer{number}@example.org" for number in rng.permutation(100_000)[:customers]])
x = rng.normal(size=(customers, 15))
x[:, 3:] += 0.5 * x[:, :1]
risk = x @ rng.normal(scale=[0.5] * 3 + [0.8] * 12) - 1.0
defaulted = rng.random(customers) < 1 / (1 + np.exp(-risk))

tables = {
    "bank": {"income": 40_000 + 9_000 * x[:, 0], "years": 8 + 3 * x[:, 1], "limit": 5_000 + 900 * x[:, 2]},
    "grocer": dict(zip(("baskets", "returns", "fresh", "brands", "coupons", "evenings"), x[:, 3:9].T, strict=True)),
    "telco": dict(zip(("minutes", "late", "abroad", "data", "messages", "devices"), x[:, 9:].T, strict=True)),
}
for name, columns in tables.items():
    table = pd.DataFrame({"email": email, **columns})
    if name == "bank":
        table["defaulted"] = np.where(defaulted, "yes", "no")
    if name == "grocer":
        table["email"] = table["email"].str.upper() + " "  # the same address, written another way
    table = table.sample(frac=0.85, random_state=len(name))
    if name == "telco":
        table.to_parquet(folder / "telco.parquet", index=False)
    else:
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4f")
