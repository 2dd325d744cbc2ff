"""Live migration of an image to another pool, namespace or layout: prepare, execute, commit or abort.

Records and steps are librbd's, so that a migration begun by one can go on with the other:

* *prepare*: the source goes to the trash and its header says where it migrates to; the destination is made under its
  name, with the source's snapshots, and its header says what it migrates from. From here on programs use the
  destination: what it has no object for shows through from the source, as a clone's parent does (`image/header.py`).
* *execute* brings over everything that has not come by itself.
* *commit* removes the source. *abort* carries what was written back, removes the destination and gives the source its
  name again.

Each may be called again after it was cut short anywhere.
"""
