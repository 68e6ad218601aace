() => {
  const banner = () => document.querySelector("#banner [data-status]");
  const plain = document.title;
  let before = {};

  const tell = (title, text) => {
    if ("Notification" in window && Notification.permission === "granted") new Notification(title, { body: text });
  };

  // Per cent in the title, and a notification at the end of a run.
  const follow = () => {
    const { status = "", percent = "", run = "" } = banner()?.dataset ?? {};
    const title = status === "running" && percent !== "" ? `${percent}% · ${plain}` : plain;
    if (document.title !== title) document.title = title;
    if (before.status === "running" && before.run === run && status !== "running" && status !== "") {
      tell(banner().querySelector("strong").textContent, run);
    }
    before = { status, run };
  };

  // What is wrong with a field stands in it, and it says so to those who do not see that.
  const mark = () => {
    const faults = JSON.parse(document.querySelector("#faults [data-faults]")?.dataset.faults ?? "{}");
    for (const old of document.querySelectorAll("[id^=error-]")) {
      if (!faults[old.id.replace("error-", "")]) accuse(old.parentElement, old, "");
    }
    for (const [name, fault] of Object.entries(faults)) {
      const field = document.getElementById(`field-${name}`);
      if (field) accuse(field, document.getElementById(`error-${name}`), fault);
    }
  };
  const accuse = (field, old, fault) => {
    const id = field.id.replace("field-", "error-");
    if (!fault) old.remove();
    else if (!old) {
      field.append(Object.assign(document.createElement("p"), { id, className: "fault", role: "alert", textContent: fault }));
    }
    else if (old.textContent !== fault) old.textContent = fault;
    for (const control of field.querySelectorAll("input, textarea")) {
      if (Boolean(fault) === (control.getAttribute("aria-invalid") === "true")) continue;
      for (const [name, value] of [["aria-invalid", "true"], ["aria-describedby", id]]) {
        if (fault) control.setAttribute(name, value);
        else control.removeAttribute(name);
      }
    }
  };

  // Two empty conversations are no two landmarks of one name.
  const unname = () => {
    for (const empty of document.querySelectorAll(".placeholder-content[role]")) empty.removeAttribute("role");
  };

  // What is scrolled can be scrolled by keys.
  const reach = () => {
    for (const scrolled of document.querySelectorAll("#yaml .cm-scroller")) {
      if (scrolled.tabIndex !== 0) scrolled.tabIndex = 0;
    }
  };

  // One tab is in the order of the Tab key, the others are reached by arrow keys.
  const tabs = () => [...document.querySelectorAll("[role=tablist] [role=tab]")].filter((tab) => tab.offsetParent !== null);
  const order = () => {
    for (const tab of tabs()) {
      const wanted = tab.getAttribute("aria-selected") === "true" ? 0 : -1;
      if (tab.tabIndex !== wanted) tab.tabIndex = wanted;
    }
  };
  const places = {
    ArrowRight: (at, count) => (at + 1) % count,
    ArrowLeft: (at, count) => (at + count - 1) % count,
    Home: () => 0,
    End: (_, count) => count - 1,
  };
  document.addEventListener("keydown", (event) => {
    const all = tabs();
    const at = all.indexOf(document.activeElement);
    if (at < 0 || !(event.key in places) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = all[places[event.key](at, all.length)];
    next.click();
    next.focus();
  });

  // Browsers ask for it only when something is pressed.
  document.addEventListener("click", (event) => {
    const starts = event.target.closest?.("#start, #resume");
    if (starts && "Notification" in window && Notification.permission === "default") Notification.requestPermission();
  });

  // Only where something has changed is the page brought up to date, which takes a hundred times as long as to ask.
  let known = "";
  const ask = async () => {
    try {
      const answer = await fetch("changes");
      const now = answer.ok ? await answer.text() : known;
      if (now !== known) document.querySelector("#look")?.click();
      known = now;
    } catch {
      // The server is gone; it says so itself.
    }
    setTimeout(ask, document.hidden ? 5000 : 2000);
  };
  ask();

  let due = false;
  const look = () => {
    due = false;
    follow();
    mark();
    unname();
    reach();
    order();
  };
  const changed = () => {
    if (!due) setTimeout(look, 50); // a frame would not come while the tab is hidden
    due = true;
  };
  new MutationObserver(changed).observe(document.body, {
    subtree: true,
    childList: true,
    characterData: true,
    attributes: true,
    attributeFilter: ["aria-selected", "class", "data-status", "data-percent", "style"],
  });
  look();
}
