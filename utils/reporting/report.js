"use strict";
// Order, filter and search of the examples; which run is shown; links into closed examples; copying the command.
for (const form of document.querySelectorAll(".controls")) {
  const list = document.getElementById(form.dataset.list);
  const items = [...list.children];
  const text = new Map();  // of each example, in lower case; made at the first search
  const number = (item, name) => Number(item.dataset[name]);  // 0 if it is not known
  const largest = (name) => (a, b) => (a.dataset[name] === "") - (b.dataset[name] === "") || number(b, name) - number(a, name);
  const smallest = (name) => (a, b) => (a.dataset[name] === "") - (b.dataset[name] === "") || number(a, name) - number(b, name);
  const orders = {
    file: () => 0,
    best: largest("rouge"),
    worst: smallest("rouge"),
    gained: largest("gain"),
    lost: smallest("gain"),
    helped: largest("change"),
    hurt: smallest("change"),
    unsupported: largest("unsupported"),
    missed: largest("missed"),
  };
  const filters = {
    "": () => true,
    gained: (item) => number(item, "gain") > 0,
    lost: (item) => number(item, "gain") < 0,
    helped: (item) => number(item, "change") > 0,
    hurt: (item) => number(item, "change") < 0,
    unsupported: (item) => number(item, "unsupported") > 0,
    missed: (item) => number(item, "missed") > 0,
  };
  const contains = (item, wanted) => {
    if (!wanted) return true;
    if (!text.has(item)) text.set(item, item.textContent.toLowerCase());
    return text.get(item).includes(wanted);
  };
  const order = () => {
    items.sort((a, b) => orders[form.elements.order.value](a, b) || number(a, "file") - number(b, "file"));
    list.append(...items);
  };
  const filter = () => {
    const wanted = form.elements.text.value.trim().toLowerCase();
    let shown = 0;
    for (const item of items) {
      item.hidden = !(filters[form.elements.filter.value](item) && contains(item, wanted));
      shown += !item.hidden;
    }
    form.querySelector("output").textContent = shown === items.length ? `${shown} examples` : `${shown} of ${items.length} examples`;
  };
  form.elements.order.addEventListener("change", order);
  form.elements.filter.addEventListener("change", filter);
  form.elements.text.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const radio of form.querySelectorAll("[name=run]")) {
    radio.addEventListener("change", () => {
      for (const part of list.querySelectorAll(".run")) part.hidden = radio.value && !part.classList.contains(`run${radio.value}`);
    });
  }
  const button = form.elements.open;
  button.addEventListener("click", () => {
    const open = button.textContent === "Open all";
    for (const item of items) if (!item.hidden) item.firstElementChild.open = open;
    button.textContent = open ? "Close all" : "Open all";
  });
}
const showTarget = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const closed = target && target.closest("details");
  if (closed) {
    closed.open = true;
    target.scrollIntoView({block: "nearest"});
  }
};
addEventListener("hashchange", showTarget);
showTarget();
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const command = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(command);
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";  // the browser does not let a file copy
    }
  });
}
