"""Reference implementations of mmdetection's and detectron2's formulas with scalar loops."""

import math

import torch


def bilinear(feature, y, x):
    """The value (C,) of a map (C, H, W) at a point whose unit is cells, cell centers at whole numbers."""
    height, width = feature.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(len(feature))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    above = feature[:, top, left] * (1 - (x - left)) + feature[:, top, right] * (x - left)
    below = feature[:, bottom, left] * (1 - (x - left)) + feature[:, bottom, right] * (x - left)
    return above * (1 - (y - top)) + below * (y - top)


def roi_align(feature, box, size, stride):
    """Aligned, with an adaptive number of samples: (C, size, size) of a map (C, H, W)."""
    x1, y1, x2, y2 = (float(side) / stride - 0.5 for side in box)
    cell_h, cell_w = (y2 - y1) / size, (x2 - x1) / size
    down, across = math.ceil(cell_h), math.ceil(cell_w)
    out = torch.zeros(len(feature), size, size)
    for row in range(size):
        for column in range(size):
            for i in range(down):
                for j in range(across):
                    y, x = y1 + (row + (i + 0.5) / down) * cell_h, x1 + (column + (j + 0.5) / across) * cell_w
                    out[:, row, column] += bilinear(feature, y, x) / (down * across)
    return out


def level_of(box):
    """The level (0 to 3) that a box is cut out of."""
    x1, y1, x2, y2 = box.tolist()
    return min(max(math.floor(math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 56 + 1e-6)), 0), 3)


def anchors(map_sizes, strides, sides, ratios):
    """All anchors of a pyramid [x1, y1, x2, y2]: cell by cell, ratio by ratio, side by side."""
    found = []
    for (height, width), stride, level_sides in zip(map_sizes, strides, sides, strict=True):
        for row in range(height):
            for column in range(width):
                for ratio in ratios:
                    for side in level_sides:
                        w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                        x, y = column * stride, row * stride
                        found.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return found


def iou(a, b):
    """Of two boxes given as lists."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def assign(overlaps, usable, fg_iou, bg_iou, min_pos_iou):
    """mmdetection's MaxIoUAssigner on overlaps[object][anchor]: an object, -1 for background, None for neither."""
    count = len(usable)
    result = [None] * count
    for anchor in range(count):
        column = [ious[anchor] for ious in overlaps]
        best = max(column, default=0.0)
        if best < bg_iou:
            result[anchor] = -1
        elif best >= fg_iou:
            result[anchor] = column.index(best)
    for index, ious in enumerate(overlaps):
        best = max(value for value, use in zip(ious, usable, strict=True) if use)
        if best >= min_pos_iou and best > 0:
            for anchor in range(count):
                if usable[anchor] and ious[anchor] == best:
                    result[anchor] = index
    return [one if use else None for one, use in zip(result, usable, strict=True)]


def encode(box, anchor):
    """The deltas (x, y, width, height) from an anchor to a box, lists."""
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx = (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / w
    dy = (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / h
    return [dx, dy, math.log((box[2] - box[0]) / w), math.log((box[3] - box[1]) / h)]


def decode(deltas, box, stds):
    """The box (4,) that a box is moved to by deltas (4,)."""
    dx, dy, dw, dh = (d * s for d, s in zip(deltas, stds, strict=True))
    w, h = box[2] - box[0], box[3] - box[1]
    x, y = (box[0] + box[2]) / 2 + dx * w, (box[1] + box[3]) / 2 + dy * h
    w, h = w * torch.exp(dw), h * torch.exp(dh)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def clip(box, size):
    """A box (4,) cut at the borders of an image of (height, width)."""
    return torch.stack([box[i].clamp(0, size[1 - i % 2]) for i in range(4)])


def focal_loss(logits, label, alpha=0.25, gamma=2.0):
    """Of one anchor's logits (K,), summed over classes; label from 0, or None for background."""
    total = torch.zeros(())
    for index, p in enumerate(logits.sigmoid()):
        if index == label:
            total = total - alpha * (1 - p) ** gamma * p.log()
        else:
            total = total - (1 - alpha) * p**gamma * (1 - p).log()
    return total
