"use strict";

// While a rotation runs, fetch the page again and replace the parts that changed. The server renders
// everything, so the page also works without this script: it then reloads itself.
// It polls because server-sent events would keep a connection open and delay the server's shutdown.

const EVERY = 400; // milliseconds

function isRunning() {
  return document.getElementById("rotation").dataset.running === "true";
}

function takeOver(fresh) {
  for (const old of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(old.id);
    // Leave unchanged parts alone: one may have the focus.
    if (now === null || old.isEqualNode(now)) continue;
    const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
    Object.assign(old.dataset, now.dataset);
    // Keep the element itself, so that a screen reader announces the new text of role="status".
    old.replaceChildren(...now.childNodes);
    if (focused) document.getElementById(focused)?.focus();
  }
}

async function follow() {
  try {
    const answer = await fetch("/" + location.search, { cache: "no-store" });
    if (answer.ok) {
      takeOver(new DOMParser().parseFromString(await answer.text(), "text/html"));
    }
  } catch {
    // The server is unreachable for a moment. The next round asks again.
  }
  if (isRunning()) setTimeout(follow, EVERY);
}

if (isRunning()) setTimeout(follow, EVERY);
