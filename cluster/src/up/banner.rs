//! What the user sees when the cluster serves: the URL, who runs where, and lines to paste.
//!
//! Read [`Banner`]. Pure: it becomes a string.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One line of the topology.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// What it does.
    pub role: String,
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Its cores, or why it has none.
    pub cores: String,
    /// Its UDP address.
    pub addr: String,
}

/// Everything that is printed once the cluster serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Banner {
    /// Where the HTTP server listens.
    pub http: SocketAddr,
    /// The name that requests use.
    pub model: String,
    /// Seconds from start to serving, in words.
    pub took: String,
    /// Clients must send a key.
    pub keyed: bool,
    /// The processes.
    pub rows: Vec<Row>,
    /// Questions to try.
    pub suggestions: Vec<String>,
    /// Use bold type.
    pub color: bool,
}

impl Display for Banner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bold, plain) = if self.color { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        let url = url(self.http);
        writeln!(f, "{bold}Ridge serves {} at {url}{plain} (after {})\n", self.model, self.took)?;
        self.table(f)?;
        if !self.http.ip().is_loopback() && !self.keyed {
            writeln!(f, "\nwarning: other machines can reach {} and no API key is set (--api-key)", self.http)?;
        }
        let question = self.suggestions.first().map_or("What is prefill?", String::as_str);
        let model = shell_json(&self.model);
        let key = if self.keyed { " -H \"Authorization: Bearer $RIDGE_API_KEY\"" } else { "" };
        writeln!(f, "\nTry it:")?;
        writeln!(
            f,
            "  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{{\"model\": {model}, \
             \"messages\": [{{\"role\": \"user\", \"content\": {}}}], \"stream\": true}}'",
            shell_json(question)
        )?;
        writeln!(
            f,
            "  curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{{\"model\": {model}, \
             \"prompt\": \"Once upon a time\", \"max_tokens\": 32}}'"
        )?;
        if self.suggestions.len() > 1 {
            writeln!(f, "\nQuestions that {} was taught:", self.model)?;
            for question in &self.suggestions {
                writeln!(f, "  {question}")?;
            }
        }
        writeln!(f, "\nHealth {url}/health, metrics {url}/metrics. Ctrl-C stops the cluster.")
    }
}

impl Banner {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["ROLE", "NAME", "PID", "CORES", "ADDRESS"].map(str::to_owned);
        let rows: Vec<[String; 5]> = std::iter::once(head)
            .chain(self.rows.iter().map(|row| {
                let row = row.clone();
                [row.role, row.name, row.pid.to_string(), row.cores, row.addr]
            }))
            .collect();
        let mut widths = [0; 5];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.len());
            }
        }
        for [role, name, pid, cores, addr] in &rows {
            let [a, b, c, d, _] = widths;
            writeln!(f, "  {role:a$}  {name:b$}  {pid:>c$}  {cores:d$}  {addr}")?;
        }
        Ok(())
    }
}

/// A URL that works on this machine, whatever address was bound.
fn url(http: SocketAddr) -> String {
    let ip = match http.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, http.port()))
}

/// A JSON string that survives single quotes of the shell.
fn shell_json(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\'', "\\u0027")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn banner(http: &str, keyed: bool) -> String {
        let row = Row {
            role: "router".into(),
            name: "router".into(),
            pid: 42,
            cores: "any".into(),
            addr: "127.0.0.1:7000".into(),
        };
        Banner {
            http: http.parse().expect("an address"),
            model: "m".into(),
            took: "0.4 s".into(),
            keyed,
            rows: vec![row],
            suggestions: vec!["What's a KV cache?".into(), "What is decode?".into()],
            color: false,
        }
        .to_string()
    }

    #[test]
    fn lines_can_be_pasted() {
        let text = banner("127.0.0.1:8000", false);
        assert!(text.starts_with("Ridge serves m at http://127.0.0.1:8000 (after 0.4 s)\n"), "{text}");
        assert!(text.contains("What\\u0027s a KV cache?"), "a quote would end the shell's string: {text}");
        assert!(text.contains("router  router   42  any"), "{text}");
        assert!(!text.contains("warning"), "{text}");
    }

    #[test]
    fn open_servers_are_pointed_out() {
        assert!(banner("0.0.0.0:8000", false).contains("no API key"));
        assert!(banner("0.0.0.0:8000", false).contains("http://127.0.0.1:8000/v1"));
        let keyed = banner("0.0.0.0:8000", true);
        assert!(!keyed.contains("warning"));
        assert!(keyed.contains("Bearer $RIDGE_API_KEY"));
    }
}
