#!/bin/sh
# AWS announces the end of a spot machine in its metadata service, two minutes ahead. Ray does not read this notice. This
# script does, on each worker, and drains the node: the run saves a checkpoint and continues without the machine.
#
#   spot-notice.sh HEAD:PORT [METADATA [SECONDS]]    address of Ray's head; metadata service; seconds between requests
set -u
address=$1
metadata=${2:-http://169.254.169.254}
seconds=${3:-5}
ask() { wget --quiet --output-document=- --timeout=2 --tries=1 "$@"; }

while sleep "$seconds"; do
    session=$(ask --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") || continue
    # 404 until there is a notice.
    notice=$(ask --header="X-aws-ec2-metadata-token: $session" "$metadata/latest/meta-data/spot/instance-action") || continue
    echo "$notice"
    ray drain-node --address "$address" --reason DRAIN_NODE_REASON_PREEMPTION \
        --reason-message "AWS takes the spot machine back" --deadline-remaining-seconds 110 && exit
done
