#!/usr/bin/env bash
# A bank and two retailers on one machine, each a process of its own, doing what three organisations would do.
# Needs `colonnade` on the PATH (pip install colonnade, or `make demo` and then PATH=.venv/bin:$PATH).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-out/example}
mkdir -p "$work"
cp "$here"/{bank,grocer,telco}.toml "$work"
"${PYTHON:-python}" "$here/make_tables.py" "$work"
cd "$work"

echo "== keys: every party makes its own and sends the public line to the others"
agreement=$(cat "$here/agreement.toml")
for name in bank grocer telco; do
    rm -f "$name.key"
    colonnade keygen "$name"
    agreement=${agreement//PUBLIC_KEY_OF_$name/$(cat "$name.pub")}
done
printf '%s\n' "$agreement" > agreement.toml

echo "== every party checks its own table, and approves the agreement"
for name in bank grocer telco; do
    colonnade check "$name.toml"
    colonnade sign "$name.toml"
done

echo "== all three run at the same time; each waits for the others"
colonnade run grocer.toml > grocer.txt 2>&1 &
grocer=$!
colonnade run telco.toml > telco.txt 2>&1 &
telco=$!
colonnade run bank.toml
wait "$grocer"
wait "$telco"

echo "== compliance: the three reports alone and against each other"
colonnade verify out/*/psi_report.json --agreement agreement.toml

echo "== scores for new customers (here: the same tables again)"
colonnade predict grocer.toml --input grocer.csv > grocer.txt 2>&1 &
grocer=$!
colonnade predict telco.toml --input telco.parquet > telco.txt 2>&1 &
telco=$!
colonnade predict bank.toml --input bank.csv --output scores.csv
wait "$grocer"
wait "$telco"
head -n 3 scores.csv
