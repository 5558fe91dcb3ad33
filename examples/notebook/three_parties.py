"""Three parties in one process, for a notebook: the same roles, messages and checks as over a network.

Run it: python examples/notebook/three_parties.py
"""

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from parties.identity import Identity
from parties.memory import make_agreement, play
from parties.session import Session
from psi.align import align
from psi.identifiers import canonical
from vfl.linear import VerticalLogisticRegression

# Three tables about partly the same people. In real life each is in another house.
data = load_breast_cancer(as_frame=True)
rng = np.random.default_rng(1)
tables = {}
for place, name in enumerate(("clinic", "laboratory", "imaging")):
    people = rng.permutation(569)[:500]
    table = data.data.iloc[people, [4 + place, 8 + place, 14 + place, 20 + place]].reset_index(drop=True)
    table.insert(0, "patient", [f" patient {number} " for number in people])
    tables[name] = table
    if name == "clinic":
        diagnosis = data.target.to_numpy()[people]


def role(session: Session) -> tuple[int, VerticalLogisticRegression, float | None]:
    """What every party does. It sees its own table, and the session; nothing else."""
    table = tables[session.name]
    ids = canonical({"patient": table["patient"].tolist()}, session.agreement.identifiers)
    common = ids.rows[align(session, ids).rows]  # our rows, in one order for all
    X = table.drop(columns="patient").iloc[common]
    X = pd.DataFrame(StandardScaler().fit_transform(X), columns=X.columns)
    y = diagnosis[common] if session.is_label_holder else None
    model = VerticalLogisticRegression(C=1.0).fit(X, y, session=session)
    probability = model.predict_proba(X, session=session)  # at the label holder; None elsewhere
    auc = None if probability is None else float(roc_auc_score(y, probability[:, 1]))
    return len(X), model, auc


# Identities and the agreement take the place of key files and agreement.toml. The first party is the label holder.
identities = {name: Identity.generate(name) for name in tables}
agreement = make_agreement(identities, encryption={"key_bits": 2048}, identifiers={"fields": {"patient": "text/1"}})
results = play(dict.fromkeys(tables, role), agreement, identities=identities)

for name, (rows, model, auc) in results.items():
    print(f"{name:10}  {rows} rows in common, coefficients {np.round(model.coef_[0], 3)}, {model.n_iter_} exchanges")
    if auc is not None:
        print(f"{name:10}  AUC on the training rows {auc:.4f}")
