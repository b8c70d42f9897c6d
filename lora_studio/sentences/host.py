"""What is wrong with how a studio is hosted, or with what a visitor may do there: one sentence for each key."""

SENTENCES = {
    # host
    "host.kind": "LORA_STUDIO_OPEN is {kind}; it may be one of {known}. Set it to one of these, or leave it away.",
    "host.local_space": "LORA_STUDIO_OPEN is local, but this is a Space, which the whole world reaches. Set it to {known}.",
    "host.no_oauth": "LORA_STUDIO_OPEN is visitors, but there is no sign-in. On a Space set hf_oauth: true in README.md; elsewhere set "
    "OPENID_PROVIDER_URL, OAUTH_CLIENT_ID and OAUTH_CLIENT_SECRET.",
    "host.no_owner": "Nobody is named as the owner of this studio. Set LORA_STUDIO_OWNERS to account names, with commas between them.",
    "host.short_password": "LORA_STUDIO_PASSWORD has fewer than 8 characters. Take a longer one.",
    "host.number": "{variable} is {text}, which is no number above 0. Set it to one, or leave it away.",
    "host.disk": "Your workspace would hold {used}, and it may hold {most}. Remove runs, adapters or data that you no longer need.",
    "host.runs": "You have {count} runs that wait or work, and {most} is the most. Wait until one has ended, or stop one.",
    "host.steps": "This run would take {steps} steps, and {most} is the most here. Lower schedule.steps or schedule.epochs.",
    "host.sign_in": "You are not signed in (any more), so nothing was done. Sign in, and do it again.",
    "host.waits": "It has to fetch something with your sign-in, which has ended or was refused. Sign in again, and it starts by itself.",
    "host.password": "That is not the password of this studio. It is in LORA_STUDIO_PASSWORD, or in the log of its start.",
    "host.target": "{path} is there already. Give the name of a folder that is not there yet.",
    "host.no_code": "{path} lacks {missing}, which a Space needs. Run this from a checkout of the studio.",
    "host.hardware": "A Space for {hardware} is not known. Known: {known}.",
    "host.upload": "The upload has more than {most}, so it was not kept. Send fewer or smaller files.",
    "host.request": "The request has more than {most}, so it was not read. Send less text at once.",
    "host.scope": "Your sign-in does not allow {missing}. Sign out, sign in again, and allow it.",
    "host.scope_more": "Your sign-in here does not allow {missing}. Paste a token of your own that does, under Sign in, or leave it out.",
    "host.refused": "The sign-in did not come through: {reason}. Try it again.",
    "host.storage": "{path}, where files are to be kept (LORA_STUDIO_STORAGE), cannot be used: {reason}. Attach it so that it can be written, or leave the variable away.",
    "host.storage_inside": "LORA_STUDIO_STORAGE is {path}, which is inside {home} and goes with it. Set it to a folder that outlives the machine.",
    "host.storage_broken": "No manifest in {path} is whole, so nothing was brought back or written. Move that folder away to begin anew, or repair it.",
    "host.storage_taken": "A studio that started later keeps its files in {path}, so this one copies nothing there any more.",
}
