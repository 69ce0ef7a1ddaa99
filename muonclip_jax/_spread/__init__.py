"""Orthogonalization of many parameters on a mesh. A matrix's way, file by file:

moves.py         a parameter split across its matrices comes to a sharding that they can follow
stacks.py        parameters' matrices become stacks, one for each shape; results go back into them
plan.py          which device orthogonalizes which part of a stack, and what that costs
exchange.py      a plan carried out: to the working sharding, the iteration, and back
device_group.py  what devices that hold parts of the same matrices tell each other

The iteration itself is `_orthogonalize.iterations`, which takes a device group or one device.
"""
