# shellcheck shell=bash
# What CUDA and torch must be told before a rank starts; sourced. A value that is already set stays.

# Kernels of messages and of compute start in the order in which they were launched.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A module that is loaded at its first use stops the host, perhaps while a peer waits for this rank.
export CUDA_MODULE_LOADING=${CUDA_MODULE_LOADING:-EAGER}
# Sequences of many lengths leave holes that fixed segments cannot fill.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
