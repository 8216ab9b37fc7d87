"use strict";

// While a rotation runs, fetch the page again and take over the parts that changed. The server
// renders everything, so the page also works without this script: it then reloads itself.
// Polling, not server-sent events: an answer that is over at once keeps neither a connection nor
// the end of the server waiting.

const EVERY = 400; // milliseconds

function isRunning() {
  return document.getElementById("rotation").dataset.running === "true";
}

function takeOver(fresh) {
  for (const old of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(old.id);
    // What did not change is left alone: it may have the focus.
    if (now === null || old.isEqualNode(now)) continue;
    const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
    Object.assign(old.dataset, now.dataset);
    // The element itself stays, so that a screen reader announces what role="status" says now.
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
    // The server is away for a moment. The next round asks again.
  }
  if (isRunning()) setTimeout(follow, EVERY);
}

if (isRunning()) setTimeout(follow, EVERY);
