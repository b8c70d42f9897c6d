"""What is wrong with adapters, and with what is made of them: one sentence for each key."""

SENTENCES = {
    # adapter
    "adapter.refused": "{name} was not taken into the library: {reason}",
    "adapter.target": "{path} is there already. Give another folder.",
    "adapter.no_upload": "No file was chosen. Choose the .safetensors file and its adapter_config.json, or a .zip of both.",
    "adapter.archive": "{path} cannot be unpacked: {reason}. Pack it again as a plain .zip.",
    "adapter.archive_twice": "{path} holds {name} in several folders. Pack the folder of one adapter.",
    "adapter.missing": "{path} is not there. Give a PEFT folder, or a .safetensors file with its adapter_config.json beside it.",
    "adapter.no_assistant": "There is no assistant {path}. Give its folder or .safetensors file, its id in the library, or owner/name on the Hub "
    "(owner/name/file.safetensors where there are several).",
    "adapter.unreadable": "{path} cannot be read: {reason}. Check the file and its permissions.",
    "adapter.no_weights": "{path} has no {wanted}. Choose the folder that holds the adapter's weights.",
    "adapter.many_files": "{path} holds several weight files: {known}. Give the one that is meant.",
    "adapter.pickle": "{path} is a pickle. Pickles can run code, so it is never opened; ask for a .safetensors file.",
    "adapter.stranger": "{path} is {what}. Download the .safetensors file itself.",
    "adapter.empty_file": "{path} is empty. Download it again.",
    "adapter.cut": "{path} is cut off: it has {there} bytes, and its header promises {promised}. Download it again.",
    "adapter.junk": "{path} has {extra} bytes after its end. Download it again, or ask for a clean file.",
    "adapter.not_safetensors": "{path} is not a safetensors file: {reason}. Download it again.",
    "adapter.not_json": "{path} has a broken text part: {reason}. Download it again.",
    "adapter.duplicate": "{path} holds the name {name} twice. Readers would disagree about it; ask for a clean file.",
    "adapter.entry": "{path}: the tensor {name} is described wrongly: {reason}. Download the file again.",
    "adapter.empty_tensor": "{path}: the tensor {name} is empty (shape {shape}), as when a sharded run is saved without gathering its "
    "parts. Save the adapter again.",
    "adapter.header_limit": "{path} has {what} than an adapter needs (limit {limit}). It is not opened; check where it comes from.",
    "adapter.no_tensors": "{path} holds no tensors. Save the adapter again.",
    "adapter.no_config": "{path} has no adapter_config.json beside it, so its strength is unknown. Put the file there, or give base and "
    "lora_alpha.",
    "adapter.config_lacks": "adapter_config.json lacks {name}. Save the adapter again with PEFT, or give the value.",
    "adapter.config_value": "adapter_config.json: {name} is {value}. {reason}.",
    "adapter.pattern": "adapter_config.json: the pattern {pattern} cannot be used: {reason}. Replace it by the layers' names.",
    "adapter.native_part": "{path} is a {method} adapter, and its tensor {name} is not one of that method. Save it again with PEFT.",
    "adapter.native_shapes": "{path} is a {method} adapter, and the tensors of {name} do not fit each other, or its settings change what they mean. Convert it to LoRA with PEFT's convert_to_lora first.",
    "adapter.native_width": "{path} is a {method} adapter whose file does not say how wide its layers are. The base it was made for does: fetch that, and name it when the adapter is added (--base, or the field Base).",
    "adapter.old_oft": "{path} is an OFT adapter of an older PEFT, which computed it in another way, and PEFT reads it no longer either. Train it again.",
    "adapter.no_rotation": "{path}: the rotation of {name} is infinite. The training diverged; use an earlier checkpoint.",
    "adapter.virtual": "{path}: its virtual tokens have the shape {here}, but adapter_config.json says {said}. Use the configuration that was saved with it.",
    "adapter.virtual_image": "{path} is virtual tokens before the words of a language model, and {base} makes pictures. Choose the base it was made for.",
    "adapter.virtual_base": "{path} is virtual tokens of shape {here}, and {base} takes {there}. It was made for {own}; choose that base.",
    "adapter.vera_shared": "{path} is a VeRA adapter without the matrices that its layers share. Save it again with save_projection.",
    "adapter.method": "{path} is a {method} adapter, which is not supported yet. LoRA adapters in PEFT's format are.",
    "adapter.image": "{path} is a {form} adapter for {family}, and its {name} is not known here. LoRA of diffusers, kohya and ComfyUI can be "
    "brought in for Stable Diffusion 1, 2, XL, FLUX.1 and Z-Image; ask for it in diffusers' form.",
    "adapter.lycoris_word": "{path} holds {name}, which makes the update more than a product of small matrices, so it is not brought in (DoRA's "
    "dora_scale, LyCORIS' scalar). Train it without, or have LyCORIS merge it.",
    "adapter.lycoris_layer": "{path} has weights for {name}, which is no layer known here. LoHa and LoKr are brought in for Stable Diffusion 1, 2, XL, "
    "FLUX.1 and Z-Image; check what it was trained on.",
    "adapter.lycoris_parts": "{path}: the layer {name} has {have}, which is no whole LoHa or LoKr. The file is incomplete; save or download it again.",
    "adapter.lycoris_shapes": "{path}: the tensors of {name} do not fit each other. Save the adapter again.",
    "adapter.lycoris_open": "{path}: {name} is a convolution in Stable Diffusion 1 and a linear layer in 2 and XL, and the file does not say which "
    "it is for. Ask for the file with its training metadata (ss_base_model_version).",
    "adapter.lycoris_wide": "{path} has rank {rank} as a plain LoRA and would take {size}. Merge it into its base with LyCORIS and take the adapter "
    "out again at a lower rank with `extract`.",
    "adapter.whole_model": "{path} is a whole model, not an adapter. Use it as a base.",
    "adapter.unknown_names": "{path} holds no adapter that is known here; its first tensor is {name}. Convert it to PEFT's format.",
    "adapter.no_factors": "{path} holds no lora_A and lora_B; its first tensor is {name}. Save the adapter again.",
    "adapter.problems": "{reason}",
    "adapter.twice": "{path}: the layer {name} has its factors twice. Save one adapter to a file.",
    "adapter.half": "{path}: the layer {name} has {have} but no {lack}. The file is incomplete; save or download it again.",
    "adapter.not_floats": "{path}: the tensor {name} holds {dtype}, not floating-point numbers. Save the adapter again.",
    "adapter.shapes": "{path}: the factors of {name} do not fit each other (A {A}, B {B}). Save the adapter again.",
    "adapter.rank_differs": "{path}: {name} has rank {there}, but adapter_config.json says {said} ({count} layers differ). "
    "Use the configuration that was saved with it.",
    "adapter.no_alpha": "{path}: adapter_config.json has no lora_alpha, so its strength is unknown. Ask its author, and give lora_alpha.",
    "adapter.no_effect": "{path} changes nothing: {reason}. Train it first, or choose another file.",
    "adapter.beyond_targets": "{path}: {count} of {total} layers with weights are not among the targets of adapter_config.json, the first "
    "being {name}. Loaders would drop them; use the configuration that was saved with it.",
    "adapter.idle_targets": "{path}: adapter_config.json lists targets that have no weights: {names}. The file may be incomplete.",
    "adapter.dora_flag": "{path}: adapter_config.json says use_dora {said}, and there are {count} magnitude vectors. "
    "Use the configuration that was saved with it.",
    "adapter.magnitudes": "{path}: {name} has {there} magnitudes for {wanted} outputs, and DoRA needs one for each. Export the adapter again.",
    "adapter.no_direction": "{path}: an output of {name} is all zeros with this adapter, so DoRA's magnitude has no direction there. Use the base it was trained on.",
    "adapter.stray": "{path}: {count} tensors are no factors and adapter_config.json does not mention them, the first being {name}. "
    "Loaders would drop them; use the configuration that was saved with it.",
    "adapter.not_finite": "{path}: the tensor {name} holds {what} ({count} such tensors). The training diverged; use an earlier checkpoint.",
    "adapter.fits_nothing": "None of the {count} layers of {path} is in {base}, the first being {name}. It was made for {own}; choose that base.",
    "adapter.unknown_layers": "{path}: {count} of {total} layers are not in {base}, the first being {name}. Choose the base it was made for.",
    "adapter.other_shapes": "{path}: {name} is for a weight of shape {here}, but in {base} it has {there} ({count} such layers). "
    "It was made for {own}; choose that base.",
    "adapter.missing_layers": "{path} has weights for {there} of the {total} layers it is meant for; the first without is {name}. "
    "The file may be incomplete.",
    "adapter.other_base": "{path} says it was made for {own}, not for {base}. Check that these are the same model.",
    "adapter.nothing_to_write": "There is nothing to save: every weight is 0. Give at least one adapter a weight.",
    "adapter.rewrite": "An adapter with {what} cannot be written in the common layout. Export the files it came with.",
    "adapter.overflow": "The update of {name} does not fit {dtype}. Save in float32, or lower the weights.",
    "adapter.taken": "There is an adapter called {name} already ({id}). Choose another name, such as {suggestion}.",
    # library
    "library.unknown": "There is no adapter {id} in the library. See `library` for those that are here.",
    "library.ambiguous": "{id} fits several adapters: {known}. Give the id.",
    "library.damaged": "The files of {id} are damaged: {reason}. Import it again; its card keeps your notes.",
    "library.name": "The name {name} cannot be used. Use 1 to 80 characters that can be printed.",
    "library.tag": "The tag {tag} cannot be used. Use 1 to 40 characters that can be printed.",
    "library.not_removed": "{id} is not among the removed adapters. They are kept for 30 days.",
    "library.back_already": "The adapter {id} is in the library again, so there is nothing to bring back.",
    # blend
    "blend.count": "There are {adapters} adapters and {weights} weights. Give one weight for each.",
    "blend.weight": "The weight {weight} is not a number from -{limit} to {limit}. Change it.",
    "blend.rank": "The rank {rank} is not a whole number of at least 1. Change it.",
    "blend.shapes": "The layer {name} is {left} in one adapter and {right} in another. Blend adapters of the same base only.",
    "blend.overflow": "The layer {name} becomes infinite with these weights. Lower them.",
    "blend.bases": "{left} was made for {left_base}, {right} for {right_base}. Blend adapters of the same base only.",
    "blend.dora": "{name} is a DoRA adapter: its magnitudes make the update more than low-rank, which no other adapter can hold. Try it in the Playground, "
    "bake it into its base, or bake it and take a plain adapter out with `extract`.",
    "blend.multiplies": "{name} is an {method} adapter: it multiplies the weights instead of adding to them, which no other adapter can hold. Try it in the Playground, "
    "bake it into its base, or bake it and take a plain adapter out with `extract`.",
    "blend.half_before": "{name} is {what}, which stands before the input or does not: {weight} is no weight for it. Give it 1, or 0.",
    "blend.two_before": "{one} and {other} both stand before the input, where there is room for one. Take one of them away.",
    "blend.virtual": "{name} is {what}: its virtual tokens stand before the input and change no weight, so it cannot be blended or baked. Try it in the Playground, or load it with "
    "PEFT, or train a LoRA on the same rows.",
    "blend.method": "{name} is a {method} adapter, which cannot be blended, baked or tried here. Convert it to LoRA with PEFT's convert_to_lora first.",
    "blend.mutates": "{name} was started with {init}, which changes the base itself. Save it as plain LoRA first (PEFT: save_pretrained with "
    "path_initial_model_for_weight_conversion), or train it without {init}.",
    "blend.variant": "{name} uses {variant}, which cannot be blended, baked or tried here. Train it without.",
    "blend.bias": "{name} carries biases, which cannot be blended, baked or tried here. Train it with bias none and without lora_bias.",
    "blend.extras": "{name} carries whole tensors ({tensor}), which cannot be blended, baked or tried here. Train it without modules_to_save and new tokens.",
    "blend.what": "A blend needs adapters and a name. Write for example blend pirate=1 capitals=0.7 --name both.",
    # mix
    "mix.many": "There are {count} adapters in the mix, and it has room for {most}. Take some out, or save a part of them as a blend first.",
    "mix.weight": "The weight of {name} is {weight}, but it must be a number from {least:g} to {most:g}. Change it.",
    "mix.line": "{line} says no weight yet. Write a pattern of layers, = and a number, such as model.layers.0-3 = 0.2.",
    "mix.twice": "{pattern} has two weights. Keep one of them.",
    # weights
    "weights.pattern": "{pattern} is no pattern of layers. Write words of their names with dots between, such as model.layers.0-3 or mlp, * for any one word.",
    "weights.idle": "{pattern} means no layer of {name}, so its weight has no effect. Name one of its blocks: {blocks}.",
    "weights.layers": "{text} does not say which layers have which weight. Write for example --layers {name}:model.layers.0-3=0.5, with an adapter given before.",
    # recipe
    "recipe.alone": "--again makes an adapter by its own recipe, so it goes with no parts, name or rank. Leave them out.",
    "recipe.none": "{id} has no recipe to make it again by. Choose a blend, a merge or a resized adapter.",
    "recipe.parent": "{id} cannot be made again: its parent {name} is not in the library any more, or is another now. Bring it back first.",
    # merge
    "merge.space": "{space} is no way to take one adapter out of another. Known: direction, subspace.",
    "merge.method": "{method} is no way to merge. Known: {known}.",
    "merge.number": "The {name} {text!r} is not a number. Correct it, or leave it empty.",
    "merge.density": "The density {density} is no share above 0 and up to 1. Write for example 0.5.",
    "merge.spread": "gamma {gamma} and epsilon {epsilon} do not go with the density {density}: gamma is below 1, and epsilon keeps density ± epsilon within 0 and 1.",
    "merge.idle": "{name} has no effect on a merge by {how}. Leave it out.",
    "merge.rank": "A merge by {how} has full rank. Give --rank: it is approximated, and its true loss told.",
    "merge.two": "{how} puts two adapters together, and {count} were given. Give two.",
    "merge.other_weight": "The second adapter of orthogonal is only taken out of the first, so its weight {weight} has no effect. Leave it out.",
    "merge.slerp_weights": "The weights {left:g} and {right:g} name no place between two adapters. Give weights from 0 up, not both 0.",
    "merge.grouped": "{name} is a grouped convolution, whose merged update has no one pair of factors. Bake it instead.",
    # resize
    "resize.how": "An adapter is resized to a rank, within a loss (of each layer with --per-layer), or to a size. Give one of the three.",
    "resize.size": "The size {size} is no whole number of bytes. Write for example 5MB.",
    "resize.slice": "{name} was not trained to be cut (dylora), so cutting rows off would lose more than it has to. Leave out --slice.",
    "resize.same": "{name} is within that already (rank {rank}), so every layer would stay as it is. Ask for less.",
    "resize.nothing": "Nothing would be left of the adapter. Allow a lower loss.",
    # ranks
    "ranks.loss": "The loss {loss} is no share from 0 to below 1. Write for example 0.05.",
    "ranks.size": "{size} bytes hold nothing of this adapter; the smallest step takes {least}. Give more.",
    # bake
    "bake.base": "None of these adapters says which base it was made for. Name the base.",
    "bake.where": "Baking needs a folder to write to. Give --out FOLDER, or --plan to write nothing.",
    "bake.empty": "There is nothing to bake yet. Pick at least one adapter.",
    "bake.name": "The model has no name. Write one, in plain letters and digits.",
    "bake.folder": "{path} is not the folder of a model. Give a base that is on this machine, as a folder.",
    "bake.dtype": "{dtype} is no precision a model is written in. Known: {known}.",
    "bake.nothing": "No weight of {base} would change: every adapter has weight 0. Give one a weight.",
    "bake.how": "--density and --seed have no effect on a plain sum. Say --how, or leave them out.",
    "bake.packed": "{name} holds packed numbers of a quantised model. Bake into the full-precision model it was made from.",
    "bake.target": "{path} exists already. Choose a new folder.",
    "bake.disk": "{path} has {free} GB free, and the baked model needs {needed} GB. Make room, or choose another disk.",
    # extract
    "extract.how": "An adapter is taken at a rank, within a loss, or both; none was given. Give one.",
    "extract.same": "{tuned} and {base} differ in no layer that an adapter carries. Choose the model that was fine-tuned.",
    "extract.shape": "{name} is {here} in {tuned} and {there} in {base}. Choose the base it was made from.",
    # export
    "export.form": "{form} is no form an adapter is exported in. Known: {known}.",
    "export.base": "The adapter does not say which base it was made for, and {form} needs its sizes. Name it with --base.",
    "export.virtual": "This is {what}, which changes no weight, and no other form or type of numbers is written of it. Export the files it came with.",
    "export.multiplies": "An {method} adapter has no B·A, which all other forms and types of numbers are made of. Export the files it came with, or bake it and take a "
    "plain adapter out with `extract`.",
    "export.dora": "A DoRA adapter has magnitudes beside its B·A, which all other forms and types of numbers are made of. Export the files it came with, or bake it and "
    "take a plain adapter out with `extract`.",
    "export.language": "The form {form} is for adapters of image models, and this one is for a language model. Export it as peft or gguf.",
    "export.kohya": "kohya's form is written for Stable Diffusion 1, 2, XL and (with its base on this machine) FLUX.1, and this adapter is for a {kind}. "
    "Export it as diffusers.",
    "export.kohya_layer": "{name} has no name in kohya's form of FLUX.1. Export the adapter as diffusers.",
    "export.unread": "{loader} cannot read this adapter in that form ({reason}), so nothing was kept. Export it in another form.",
    "export.gone": "There is no such exported file here any more. Export the adapter again.",
    "export.differs": "What its own loader read back is not the adapter: {name} is {what}. Nothing was kept; export it as peft, or report this.",
    # gguf
    "gguf.family": "llama.cpp's adapter files are written for {known}; this base is of the kind {kind}. Bake the adapter and convert the model instead.",
    "gguf.extras": "The adapter holds {name} whole, and an adapter file of llama.cpp cannot. Bake it and convert the model instead.",
    "gguf.layer": "{name} is no layer that an adapter file of llama.cpp can hold. Bake the adapter and convert the model instead.",
    "gguf.differs": "What was read back differs from the adapter (by {worst:.1e}{name}), so nothing was kept. Update the studio, or report this.",
    # tryout
    "tryout.empty": "There is no mix to try yet. Pick at least one adapter.",
    # playground
    "playground.sides": "There are {count} sides to show, and it must be 1 to {most}. Choose them under Sides to show.",
}
