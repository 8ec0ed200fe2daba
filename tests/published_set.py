"""A published data set written directly, without the stages that lead to it."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mixed_run import NAMES, blended_digits

from diffcal.data.soft_labels import published_schema


def publish_rows(folder, groups=12, members=5, files=2, seed=0, row_group=7):
    """``folder`` with blends of digits in ``files`` files and the manifest of a finished set."""
    columns, annotation = blended_digits(groups, members, seed)
    soft = np.array(annotation["soft_label"])
    content = columns | annotation | {"label": soft.argmax(axis=1).tolist()}
    content["lambda"] = [weights[0] for weights in columns["weights"]]
    schema = published_schema(NAMES)
    arrays = [pa.array(content[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    (folder / "data").mkdir(parents=True)
    rows, shards = -(-len(table) // files), []
    for number in range(files):
        name = f"data/train-{number:05d}-of-{files:05d}.parquet"
        part = table.slice(number * rows, rows)
        pq.write_table(part, folder / name, row_group_size=row_group)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        shards.append({"file": name, "rows": len(part), "sha256": digest})
    manifest = {"format": "diffcal-dataset/1", "class_names": list(NAMES), "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
