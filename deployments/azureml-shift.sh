#!/bin/sh
# Moves the endpoint's traffic from one deployment to the other: first a tenth, and all of it after a look.
#
#   sh deployments/azureml-shift.sh blue green 10     # green gets 10 %, blue 90 %
#   sh deployments/azureml-shift.sh blue green 100    # green gets all. To go back: azureml-shift.sh green blue 100
#
# Both deployments must exist: az ml online-deployment create -f deployments/azureml-green.yaml
# Replace phi3-serve by the name in deployments/azureml-endpoint.yaml.
set -eu
from=$1 to=$2 share=$3
case "$share" in
    "" | *[!0-9]*) echo "share: must be a number from 0 to 100; is $share" >&2; exit 2 ;;
esac
[ "$share" -le 100 ] || { echo "share: must be a number from 0 to 100; is $share" >&2; exit 2; }
az ml online-endpoint update --name phi3-serve --traffic "$from=$((100 - share)) $to=$share"
