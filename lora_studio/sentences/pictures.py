"""What is wrong with pictures, albums and captions: one sentence for each key."""

SENTENCES = {
    # image
    "image.two_parts": "{id} shares its work between two parts ({part} and {part}_2), which is not known here yet. Choose a base with one {part}.",
    "image.weighting": "{name} learns by flow matching, where {weighting} weighs nothing. Set task.weighting to none.",
    "image.one_file": "{id} is a model in one file, which is not read in fewer bits yet. Set compute.quantize and compute.encoders back, or use its folder.",
    "image.blocks": "{id} has {count} blocks, and compute.block_swap is {value}. Lower it.",
    "image.frames": "{name} knows still pictures only. Set task.frames to 1, or choose a model of films.",
    "image.shift": "{name} learns the steps of a noise schedule, which has no shift. Set task.shift to auto.",
    "image.out_of_reach": "{id} is a {pipeline}, which cannot be trained here: {reason}. To teach changes to pictures, choose FLUX.1 Kontext.",
    "image.prior_pairs": "{name} makes a picture of a picture, and class pictures have none. Set task.prior_pictures to 0.",
    "image.no_source": "{id} makes a picture of a picture, and {count} of {total} pictures of {path} have no source (first: {name}). Put each source "
    "into control/ under its picture's name, or name it in the metadata column source_file_name.",
    "image.text_encoder": "The text encoders of {name} get no adapter here. Set task.text_encoder to false, or choose one of: {known}.",
    "image.multiple": "Pictures for {name} need edges that are multiples of {multiple}, and {field} is {value}. Change {field}.",
    # picture
    "picture.folder_empty": "{path} holds no picture ({known}). Choose the folder that holds them.",
    "picture.nothing_left": "No picture of {path} is left to train on: {reasons}.",
    "picture.file_kind": "{name} is a {suffix} file; pictures are read from a folder or a .zip. Choose the folder it is in.",
    "picture.closed": "{path} cannot be read: {reason}. Change its permissions, or copy it to a folder of yours.",
    "picture.changed": "{name} could be read before, and now it cannot: {reason}. Put it back, or start again without it.",
    "picture.archive": "{name} was not unpacked: {reason}. Pack the pictures again as a plain .zip.",
    "picture.hub_column": "{id} has no column of pictures (it has {columns}). Choose another data set, or set columns.picture.",
    # album
    "album.unknown": "There is no album {album} here. Known: {known}. Drop pictures to make one.",
    "album.gone": "The album {album} is no longer there; it may have been moved or deleted. Choose another one.",
    "album.busy": "The album {album} is being changed by another process. Try again in a moment.",
    "album.stale": "{album} was changed elsewhere since this page showed it, so nothing was done. It is shown as it is now; do it again if you still want to.",
    "album.caption_changed": "The caption of {picture} was changed elsewhere meanwhile, to: {now}. Yours was not written. Compare them, then save again.",
    "album.no_picture": "{album} has no picture {picture}; it may have been taken out. Look at the album again.",
    "album.none_chosen": "No picture of {album} is chosen. Choose at least one.",
    "album.nothing_to_undo": "There is nothing to undo in {album}.",
    "album.nothing_to_redo": "There is nothing to do again in {album}.",
    "album.not_removed": "{album} is not among the removed albums. They are kept for 30 days.",
    "album.edit": "{kind} is no change of captions. Known: {known}.",
    "album.no_words": "There are no words to {kind}. Write them first.",
    "album.caption": "The caption of {picture} was not kept, because {reason}. Change it and save again.",
    "album.no_files": "No file was given. Give pictures, or a .zip of them.",
    "album.refused": "Nothing was taken. {reason}",
    # caption
    "caption.model": "{id} cannot write captions: {reason}. Choose an image-to-text model, such as Salesforce/blip-image-captioning-base.",
    "caption.none": "There is nothing to caption in {album}: every picture that was asked for has a caption already, or is gone. Choose others, or all.",
    # grid
    "grid.empty": "The grid has no {what}. Give at least one.",
    "grid.large": "The grid would have {count} pictures; at most {most} are drawn at once. Take away rows, strengths or prompts.",
    "grid.row": "{name} is no row of this mix. Pick the rows again.",
    "grid.strengths": "The strengths {text!r} are not all numbers. Write for example 0, 0.5, 1.",
}
