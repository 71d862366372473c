// Everything but copying works without this.
"use strict";

// A key that was shown is gone: from the history, and from the page when it is left.
const secret = document.querySelector("[data-secret]");
if (secret) {
  const list = document.querySelector("[data-list]").href;
  for (const link of document.querySelectorAll("a:not([href^='#'])")) {
    link.href = link.href; // as it is seen from this address, not from that
  }
  history.replaceState(null, "", list); // what is reloaded, or restored, is the list
  addEventListener("pagehide", () => secret.replaceChildren());
  addEventListener("pageshow", (event) => {
    if (event.persisted) location.replace(list);
  });
}

// What is said once is not said again when the page is reloaded.
if (document.querySelector("[data-once]")) history.replaceState(null, "", location.pathname);

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const source = document.getElementById(button.dataset.copy);
    const told = document.getElementById("copied");
    const say = (text) => {
      if (told) told.textContent = text;
    };
    say("");
    const copying = navigator.clipboard
      ? navigator.clipboard.writeText(source.textContent)
      : Promise.reject(new Error("not a secure page"));
    copying.then(
      () => say(button.dataset.done),
      () => {
        getSelection().selectAllChildren(source); // for the person to copy
        say(button.dataset.failed);
      },
    );
  });
}

for (const form of document.querySelectorAll("[data-busy]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) {
      event.preventDefault(); // a second click
      return;
    }
    form.dataset.sent = "yes";
    const busy = form.querySelector("#busy") || document.getElementById("busy");
    busy.hidden = false;
    busy.textContent = form.dataset.busy;
    form.setAttribute("aria-busy", "true");
  });
}
// Restored with "back", a form can be sent again.
addEventListener("pageshow", (event) => {
  if (event.persisted && document.querySelector("[data-sent]")) location.reload();
});

for (const choice of document.querySelectorAll("[data-date]")) {
  const field = document.getElementById(choice.dataset.date);
  const show = () => {
    field.hidden = choice.value !== "date";
    if (field.hidden) field.querySelector("input").value = "";
  };
  if (field.querySelector("input").value) choice.value = "date";
  choice.addEventListener("change", show);
  show();
}

// What is searched for stands in the address, and so in histories and logs: never a whole key.
for (const field of document.querySelectorAll("[type=search]")) {
  field.addEventListener("input", () => {
    field.value = field.value.replace(/(tfm_k_[0-9a-f]{8})[0-9a-f]+/gi, "$1");
  });
}
